"""The request to stop, in a process of its own."""

import signal
import subprocess
import sys

import pytest

LISTENER = """
import signal, time
from nano_pretrain.train.signals import StopRequest
request = StopRequest()
request.listen()
print("listening", flush=True)
while request.signal_name is None:
    time.sleep(0.01)
print(request.signal_name, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_is_remembered_and_only_a_second_sigint_ends_the_process(name: str) -> None:
    number = signal.Signals[name]
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            process.send_signal(number)
            assert process.stdout.readline() == f"{name}\n"
            process.send_signal(number)
            if name == "SIGINT":
                assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(timeout=0.3)
        finally:
            process.kill()
