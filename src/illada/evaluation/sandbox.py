"""Run a generated program in a separate process with limits on time, memory, files, processes and network.

This contains accidents, not attackers: if you distrust the model, run the evaluation in a container. The harness runs
such tasks only with `--confirm_run_unsafe_code`; `illada eval` only with `--allow_code`.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS, MEMORY = 10.0, 2 * 2**30
"""Limits of one program, its tests included."""

# The child first sets its own limits. Audit hooks cannot be removed, and since ctypes is forbidden nothing in the
# interpreter gets around them.
CHILD = """
import os, resource, sys
fd, seconds, memory, token = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
source = sys.stdin.read()
for kind, most in (
    (resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 2**20),
    (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
):
    resource.setrlimit(kind, (most, most))
here = os.path.realpath(os.getcwd())
banned = ("socket.", "subprocess.", "ctypes.", "pty.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
          "os.kill", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "shutil.")
def watch(event, arguments):
    if event.startswith(banned):
        raise PermissionError(event)
    if event == "open" and (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        path = arguments[0]
        if not isinstance(path, (str, bytes)) or not os.path.realpath(os.fsdecode(path)).startswith(here):
            raise PermissionError("write outside the folder")
sys.argv = ["answer.py"]
program = compile(source, "answer.py", "exec")
sys.addaudithook(watch)
exec(program, {"__name__": "__main__"})
os.write(fd, token.encode())
"""


def passes(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether a Python program runs to its very end within the limits; leaving early does not count.

    Args:
        program: source, tests included.
        seconds: most seconds of wall-clock time and of processor time.
        memory: most bytes of address space.
    """
    token = secrets.token_hex(16)
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", CHILD, str(write), str(seconds), str(memory), token],
            cwd=folder,
            env={"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        try:
            child.communicate(program.encode(errors="replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    with os.fdopen(read, "rb") as pipe:
        return pipe.read(64) == token.encode()
