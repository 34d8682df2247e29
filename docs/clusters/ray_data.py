"""The pictures of a job file with Ray Data, an actor for each GPU: python ray_data.py jobs.jsonl pictures"""

import sys

import ray

from ddim_cli import Sampler

CONFIG = {"model": {"source": "mnist"}, "sampling": {"steps": 50, "batch_size": 64}}
JOBS, PICTURES = sys.argv[1:]

ray.init()
gpus = int(ray.cluster_resources().get("GPU", 0))
rows = ray.data.read_json(JOBS).repartition(target_num_rows_per_block=1024)
pictures = rows.map_batches(
    Sampler,
    fn_constructor_args=[CONFIG],
    # A multiple of sampling.batch_size: what is short of it would be filled up.
    batch_size=256,
    num_gpus=1 if gpus else 0,
    compute=ray.data.ActorPoolStrategy(size=gpus or 1),
)
pictures.write_parquet(PICTURES)
