import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = """
import multiprocessing
from data_prep import tokenizer
from data_prep.read import Document
using = tokenizer.encoder(tokenizer.train(["some text"], 270, "<eos>"), "<eos>", 0, "test")
endless = iter(lambda: [Document("place", "some text")], None)
for encoded in tokenizer.encode_all(using, endless, 2):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


def test_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with parent.stdout as lines:
        workers = [Path("/proc") / pid for pid in lines.readline().split()]
        assert len(workers) == 2
        assert all(worker.exists() for worker in workers)
        parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.05)
