"""``python -m tests.fuzz [COUNT] [SEED]``: exit code 1 if a reader fails."""

import sys
import time

from tests.fuzz.campaign import campaign


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    start = time.time()

    def report(done, _):
        print(f"{done} files, {time.time() - start:.0f} s", flush=True)

    outcomes, failures = campaign(count, seed, report=report)
    for (name, seal, kind), number in sorted(outcomes.items()):
        print(f"{name:20} {'sealed' if seal else 'damaged':8} {kind:8} {number}")
    for failure in failures[:50]:
        print("FAILED", *failure)
    print(f"{count} files, {len(failures)} failures, {time.time() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
