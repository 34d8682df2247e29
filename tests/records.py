"""What the sidecars of a run share, as small as can be."""

RECORD = {
    "sampling": {"steps": 2, "eta": 0.0, "timesteps": [500, 0]},
    "scheduler": {"beta_end": 0.02},
    "model": {"sha256": "ab", "config_sha256": "cd"},
    "runtime": {"dtype": "float32", "tf32": False, "batch_size": 3},
    "config": {},
}
# Of the rows of a job file.
OF_ROWS = {**RECORD, "sampling": {**RECORD["sampling"], "row": {}}}
# Of other settings than `RECORD`.
OTHER = {**RECORD, "sampling": {**RECORD["sampling"], "eta": 1.0}}


def lines(*names, seed=1):
    """Of items.jsonl."""
    return [{"name": name, "seed": seed} for name in names]
