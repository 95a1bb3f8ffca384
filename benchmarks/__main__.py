"""Run benchmarks: ``python -m benchmarks [NAME ...] [--quick] [--json FILE] [--readme]``."""

import argparse
import json
import warnings
from pathlib import Path

from benchmarks import (
    cold,
    consistency,
    control_variates,
    devices,
    fit,
    full_batch,
    infonce,
    limit,
    many,
    neighbors,
    roofline,
    scaling,
)
from benchmarks.measure import environment
from benchmarks.report import RESULTS, tables, update_readme

BENCHMARKS = {
    "infonce": infonce.run,
    "control_variates": control_variates.run,
    "scaling": scaling.run,
    "full_batch": full_batch.run,
    "neighbors": neighbors.run,
    "limit": limit.run,
    "cold": cold.run,
    "many": many.run,
    "consistency": consistency.run,
    "devices": devices.run,
    "fit": fit.run,
    "roofline": roofline.run,
}


def main() -> None:
    """Run what was named, print tables, store results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small cases, to see that they run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--readme", action="store_true", help="store the results and put their table into README"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmarks {sorted(unknown)}; there are {sorted(BENCHMARKS)}")
    if arguments.readme and arguments.quick:
        parser.error("--readme takes the full cases: leave --quick out")
    results = {}
    for name in arguments.names or BENCHMARKS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [row.to_dict() for row in BENCHMARKS[name](arguments.quick)]
        results[name] = {"environment": environment(), "rows": rows}
        print(f"`{name}`:\n\n{tables(results[name])}\n", flush=True)
        if arguments.readme:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(results[name], indent=1) + "\n")
    if arguments.readme:
        update_readme()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
