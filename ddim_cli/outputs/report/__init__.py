"""A folder as a page to look at: what it shows (`contents`, `sweep`), its records stated once, and the HTML of it."""
