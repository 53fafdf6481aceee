"""Makes the README's tables of plans: encoding and training with every size on slices of 16 chips of four kinds.

    python benchmarks/plan.py plans.jsonl

compiles each program for each slice (an hour on two cores), each in its own process (as the compiler does not free its
memory), appends the plans to plans.jsonl, resumes from there if it is run again, and prints the tables. No compilation
begins after --seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from f2llm_jax.configs.models import MODELS
from f2llm_jax.plan import make_plan
from f2llm_jax.planning.chips import GIB, parse_topology
from f2llm_jax.planning.jobs import EncodeJob, Job, TrainJob
from f2llm_jax.planning.report import to_dict
from f2llm_jax.train.config import load_recipe

TOPOLOGIES = ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a .jsonl file; it is made, or added to")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no compilation after so many seconds"
    )
    args = parser.parse_args()
    done = read(args.results)
    rows = [(do, size, topology) for do in ("encode", "train") for topology in TOPOLOGIES for size in MODELS]
    start = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as compiler:
        for row in tqdm([row for row in rows if row not in done], unit="plan"):
            if time.monotonic() - start > args.seconds:
                break
            done[row] = compiler.submit(compile_plan, *row).result()
            with args.results.open("a") as stream:
                stream.write(json.dumps(done[row]) + "\n")
    for do in ("encode", "train"):
        print(f"\n{do}:\n")
        print("| | " + " | ".join(TOPOLOGIES) + " |\n|" + "---|" * (len(TOPOLOGIES) + 1))
        for size in MODELS:
            print(f"| {size} | " + " | ".join(cell(done.get((do, size, topology))) for topology in TOPOLOGIES) + " |")
    ratios = [plan["work"]["flops_ratio"] for plan in done.values() if plan["work"]]
    print(f"\nmatrix products in the programs over those of the sizes: {min(ratios):.4f} to {max(ratios):.4f}")
    if left := len(rows) - len(done):
        print(f"{left} of {len(rows)} plans are still to be made: run this again")


def compile_plan(do: str, size: str, topology: str) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")
    began = time.monotonic()
    plan = to_dict(make_plan(make_job(do, size), parse_topology(topology)))
    return {"size": size, "seconds": round(time.monotonic() - began, 1), **plan}


def read(file: Path) -> dict[tuple[str, str, str], Any]:
    """{(do, size, topology): plan} from an earlier run; an incomplete line does not count."""
    plans = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            plan = json.loads(line)
        except json.JSONDecodeError:
            continue
        plans[plan["do"], plan["size"], plan["topology"]] = plan
    return plans


def make_job(do: str, size: str) -> Job:
    if do == "encode":
        return EncodeJob(config=MODELS[size])
    recipe = load_recipe(f"stage2_{size.replace('.', '_').lower()}")
    teacher = None if recipe.teacher is None else MODELS[recipe.teacher.rsplit("-", 1)[-1]]
    return TrainJob(config=MODELS[size], recipe=recipe, teacher=teacher)


def cell(plan: dict[str, Any] | None) -> str:
    if plan is None:
        return ""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    gib = f"{plan['memory']['total'] / GIB:.1f} of {plan['memory']['limit'] / GIB:.1f} GiB"
    if not plan["fits"]:
        return f"does not fit: {gib}"
    estimates = plan["estimates"]
    return f"{thousands(estimates['tokens_per_second'])} tokens/s ({estimates['bound']}), {gib}, {mesh}"


def thousands(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


if __name__ == "__main__":
    main()
