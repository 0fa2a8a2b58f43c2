"""What each of several processes does, started as by torchrun: `convllava eval` with the arguments after the first.

    torchrun --nproc_per_node 2 distributed_eval.py FOLDER MODEL --benchmark ...

Process N writes `rank-N.json` into FOLDER: how many processes there are, and the ids of the samples that it asked.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from convllava_hf.cli import main
from convllava_hf.evaluation import runner


def run(arguments: list[str]) -> dict:
    asked, append = [], runner.PredictionLog.append

    def noted(self, rows):
        rows = list(rows)
        asked.extend(row["id"] for row in rows)
        append(self, rows)

    runner.PredictionLog.append = noted
    code = main(["eval", *arguments])
    return {
        "code": code,
        "asked": asked,
        "processes": PartialState().num_processes,
        "world": torch.distributed.get_world_size(),
        "backend": torch.distributed.get_backend(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = run(sys.argv[2:])
    (Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
