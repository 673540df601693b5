"""Starting, watching and ending the servers of a benchmark."""

import os
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS_MAX = 15
SETTLE_SECONDS_MAX = 60
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Failure(Exception):
    """Something that ends the benchmark with one clear sentence."""


GIVEN_PORTS = set()


def free_port():
    """A loopback port that nothing listens on, another one each time: servers may
    share a port (SO_REUSEPORT), and a measurement would mix two of them."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port not in GIVEN_PORTS:
            GIVEN_PORTS.add(port)
            return port


def run(command, seconds_max):
    """The output of a command, or a Failure that shows what it printed."""
    try:
        result = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=seconds_max
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{Path(command[0]).name} did not end within {seconds_max} s") from None
    if result.returncode:
        printed = (result.stderr.strip() or result.stdout.strip())[-1500:]
        name = Path(command[0]).name
        raise Failure(f"{name} ended with {result.returncode}:\n{printed}")
    return result.stdout


class Processes:
    """The processes of one scenario; leaving the block ends them all."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.running.values()):
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(timeout=STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name, command):
        """Starts a server whose output goes to a file."""
        with open(self.folder / f"{name}.log", "w") as log:
            self.running[name] = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, cwd=ROOT
            )

    def expect_alive(self, name):
        """A Failure with the last of what a dead server printed."""
        process = self.running[name]
        if process.poll() is not None:
            printed = (self.folder / f"{name}.log").read_text()[-1500:]
            raise Failure(f"{name} ended with {process.returncode}:\n{printed}")

    def settle(self, name):
        """Waits until a server has finished what the last load left behind: a
        caller that hangs up does not always stop the work."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while time.monotonic() < deadline:
            before = self.cpu_seconds(name)
            time.sleep(0.25)
            if self.cpu_seconds(name) - before < 0.05:
                return
        raise Failure(f"{name} is still busy {SETTLE_SECONDS_MAX} s after the load ended")

    def cpu_seconds(self, name):
        """Processor time of a server and its children so far."""
        return sum(cpu_seconds(pid) for pid in family(self.running[name].pid))


def process_fields(pid):
    """The fields of /proc/PID/stat after the name; none if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rsplit(")", 1)[1].split()


def cpu_seconds(pid):
    """User and system time of one process."""
    fields = process_fields(pid)
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS if fields else 0.0


def family(parent):
    """A process and its descendants."""
    children = {}
    for entry in Path("/proc").iterdir():
        fields = process_fields(entry.name) if entry.name.isdigit() else None
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [parent]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found
