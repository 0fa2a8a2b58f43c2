"""What each of several processes does, started as by torchrun: trainings through the script, one after the other.

    torchrun --nproc_per_node 2 distributed_training.py RUNS.json FOLDER

RUNS.json: a list of `{"arguments": [...]}`, command lines for `convllava_hf.train`; with a `"remove"`, a file to be
removed before. Process N writes `rank-N.json` into FOLDER: a list with one entry a run, of what it was and which
samples it saw.
"""

import json
import os
import sys
from pathlib import Path

import torch

from convllava_hf.data.collator import SafeImageCollator
from convllava_hf.train import main


def one_run(arguments: list[str]) -> dict:
    seen = []

    def noted(self, examples):
        seen.append([[example["sample"], len(example["images"] or ())] for example in examples])
        return collate(self, examples)

    collate, SafeImageCollator.__call__ = SafeImageCollator.__call__, noted
    try:
        trainer = main(arguments)
    finally:
        SafeImageCollator.__call__ = collate
    return {
        "processes": trainer.accelerator.num_processes,
        "world": torch.distributed.get_world_size(),
        "backend": torch.distributed.get_backend(),
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "gradient_norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
        "batches": seen,
        "skipped": trainer.data_collator.skipped,
    }


def all_runs(runs: list[dict]) -> list[dict]:
    told = []
    for run in runs:
        if "remove" in run:
            torch.distributed.barrier()
            if os.environ["RANK"] == "0":
                Path(run["remove"]).unlink()
            torch.distributed.barrier()
        told.append(one_run(run["arguments"]))
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = all_runs(json.loads(Path(sys.argv[1]).read_text()))
    (Path(sys.argv[2]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
