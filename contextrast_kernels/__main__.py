"""``python -m contextrast_kernels doctor | demo | bench``"""

import os
import sys

USAGE = """usage: python -m contextrast_kernels {doctor,demo,bench} [options]

  doctor   print versions, devices and backends, and run a self-check of a few seconds
  demo     train a small network with and without the loss and draw what it does (demo --help lists the options)
  bench    compare the loss with its reference on your shapes: time, memory, errors (bench --help lists the options)
"""


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "doctor":
        from contextrast_kernels import doctor

        return doctor.main(rest)
    if command == "demo":
        from contextrast_kernels.demo import training

        return training.main(rest)
    if command == "bench":
        from contextrast_kernels import bench

        return bench.main(rest)
    asked_for_help = command in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked_for_help else sys.stderr, end="")
    if not asked_for_help:
        print(f"command: expected doctor, demo or bench, got {command or 'nothing'}", file=sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe; drop the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
