"""schemathesis against the HTTP door: calls that /openapi.json allows, and calls
that it forbids, generated for each operation. Any failure fails.

    python openapi.py --http 127.0.0.1:8000 [--seconds 600] [--seed 1]

The server must serve `minilm`, and ask nobody for a key. The operations are
divided over two processes, since one makes about 25 cases a second. Each goes
round its operations until the time is spent, so that however short it is, all
of them get the same share. What unloads models comes last and alone.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

from checks import CALL_SECONDS_MAX, arguments

METHODS = ("get", "put", "post", "delete", "patch")
PROCESSES = 2
# The share of the time that what unloads models gets.
LAST_SHARE = 0.1
# What the table of errors calls for: the header `timeout` may be 1 ms, and a model
# may not do what is requested. A 500 is always a defect.
SETTINGS = """
[generation]
allow-extra-parameters = false

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 501, 503, 504]
"""
FLAGS = [
    "--no-color",
    "--workers=1",
    # Cases of one operation in one round.
    "--max-examples=100",
    # Links between operations are not declared; guessed ones would load and unload models.
    "--phases=examples,coverage,fuzzing",
    # A document cannot say what each model takes: a tensor of the right form may
    # still be refused.
    "--exclude-checks=positive_data_acceptance",
    # How fast cases are made is no fault of the server.
    "--suppress-health-check=all",
    "--generation-database=none",
    f"--request-timeout={CALL_SECONDS_MAX}",
]


def operations(address):
    """The operations of the document by their names, such as `GET /v2`."""
    with urllib.request.urlopen(f"http://{address}/openapi.json", timeout=CALL_SECONDS_MAX) as response:
        document = json.load(response)
    return [
        f"{method.upper()} {path}"
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    ]


def start(address, names, seconds, seed, folder):
    """schemathesis over some operations; its output and its report are files."""
    folder.mkdir()
    (folder / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    included = [f"--include-name={name}" for name in names]
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        return subprocess.Popen(
            [
                pathlib.Path(sys.executable).with_name("schemathesis"), "run",
                f"http://{address}/openapi.json", *FLAGS, *included,
                f"--max-time={max(1, int(seconds))}", f"--seed={seed}",
                "--report=json", "--report-json-path", folder / "report.json",
            ],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
        )


def tried(address, groups, seconds, seed, folder):
    """Runs the groups side by side; returns the number of cases, or none if any failed."""
    running = []
    for names in groups:
        work = folder / str(len(list(folder.iterdir())))
        running.append((work, start(address, names, seconds, seed, work)))
    made, good = 0, True
    for work, process in running:
        if process.wait() != 0:
            good = False
            output = (work / "output.txt").read_text(encoding="utf-8")
            # What passed comes before.
            print(output[max(0, output.find("= FAILURES =")):])
        made += generated(work)
    return made if good else None


def generated(folder):
    """The number of cases of one run."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return report["test_cases"]["generated"]


def main():
    parser = arguments(__doc__.splitlines()[0], ("http",))
    parser.add_argument("--seconds", type=int, default=600, help="duration of the whole run")
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other cases")
    options = parser.parse_args()
    names = operations(options.http)
    last = [name for name in names if name.endswith("/unload")]
    first = [name for name in names if name not in last]
    steps = [([first[index::PROCESSES] for index in range(PROCESSES)], 1 - LAST_SHARE)]
    if last:
        steps.append(([last], LAST_SHARE))
    sum_made = 0
    with tempfile.TemporaryDirectory() as folder:
        for groups, share in steps:
            seconds = options.seconds * share
            made = tried(options.http, groups, seconds, options.seed, pathlib.Path(folder))
            if made is None:
                sys.exit(1)
            sum_made += made
    print(f"{sum_made} cases of {len(names)} operations, {sum_made // len(names)} of each")
    print(f"{len(names)} checks passed")


if __name__ == "__main__":
    main()
