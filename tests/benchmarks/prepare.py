"""Speed and memory of `torus prepare` against datatrove and datasets on the same text.

Run: `python -m tests.benchmarks.prepare --folder /tmp/bench --megabytes 200 --rounds 3`. The text
is what Python's library and its installed packages hold, repeated with seeded edits (lines swapped
between documents) until it has the size, as 8 files of JSONL. A BPE tokenizer of 32,000 ids is
learned from it once. Then the contenders take turns with 2 worker processes each: read, tokenise,
write tokens and offsets. Only Torus also cleans, drops exact duplicates and hashes what it writes.
Memory is the largest sum of the resident sizes of all processes of a contender, 20 times a second;
pages that processes share count once for each of them.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

FILES, WORKERS, VOCAB = 8, 2, 32_000
KINDS = (".py", ".md", ".rst", ".txt")

DATATROVE = """
import json, os, sys
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.tokens import DocumentTokenizer
text, tokenizer, out, workers = sys.argv[1:]
def read(data, rank, world_size):  # its own JSONL reader needs one more package
    for name in sorted(os.listdir(text))[rank::world_size]:
        with open(os.path.join(text, name)) as stream:
            for line in stream:
                yield Document(text=json.loads(line)["text"], id="")
if __name__ == "__main__":
    steps = [read, DocumentTokenizer(out, tokenizer, shuffle_documents=False, batch_size=100)]
    LocalPipelineExecutor(
        steps, tasks=8, workers=int(workers), logging_dir=out + "/logs"
    ).run()
"""
DATASETS = """
import os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import datasets, tokenizers
text, reference, out, workers = sys.argv[1:]
tokenizer = tokenizers.Tokenizer.from_file(reference)
def encode(batch):
    found = tokenizer.encode_batch(batch["text"], add_special_tokens=False)
    return {"ids": [one.ids for one in found]}
if __name__ == "__main__":
    files = sorted(os.path.join(text, name) for name in os.listdir(text))
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=out + "/cache")
    kind = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    rows = rows.map(encode, batched=True, batch_size=100, num_proc=int(workers),
                    remove_columns=["text"], features=kind)
    rows.save_to_disk(out + "/saved", num_proc=int(workers))
"""


def make_text(folder: Path, size: int) -> int:
    """Writes `size` bytes of documents as JSONL; returns how many bytes the files have."""
    roots = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])
    paths = sorted(
        path
        for root in roots
        for path in Path(root).rglob("*")
        if path.suffix in KINDS and path.is_file() and 200 < path.stat().st_size < 200_000
    )
    documents = [path.read_text(errors="replace").split("\n") for path in paths]
    draw = random.Random(0)
    folder.mkdir(parents=True)
    streams = [open(folder / f"{n}.jsonl", "w") for n in range(FILES)]  # noqa: SIM115
    written = number = 0
    while written < size:
        for own in documents:
            lines = own.copy()
            for _ in range(1 + len(lines) // 20):
                other = draw.choice(documents)
                lines[draw.randrange(len(lines))] = draw.choice(other)
            text = "\n".join(lines)
            streams[number % FILES].write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            number += 1
            if written >= size:
                break
    for stream in streams:
        stream.close()
    return sum(path.stat().st_size for path in folder.iterdir())


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Runs a command; returns (seconds, peak resident GB of all its processes together)."""
    peak = 0
    with open(log, "w") as stream:
        begin = time.monotonic()
        job = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while job.poll() is None:
            peak = max(peak, sum(map(resident, family(job.pid))))
            time.sleep(0.05)
    if job.returncode:
        sys.exit(f"{command[:4]} failed:\n{log.read_text()[-2000:]}")
    return time.monotonic() - begin, peak / 1e9


def family(root: int) -> list[int]:
    """Returns the process and all that it started."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found = [root]
    for one in found:
        found += [pid for pid, parent in parents.items() if parent == one]
    return found


def resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=["datatrove", "datasets"])
    parser.add_argument("--torus", nargs=argparse.REMAINDER, default=[], help="more arguments")
    args = parser.parse_args()
    text, tokenizer = args.folder / f"text{args.megabytes}", args.folder / "tokenizer.json"
    if not text.exists():
        make_text(text, args.megabytes * 10**6)
    if not tokenizer.exists():
        from trainer.data.tokenizer import train_bpe

        with open(text / "0.jsonl") as stream:
            lines = [json.loads(next(stream))["text"] for _ in range(1000)]
        tokenizer.write_bytes(train_bpe(iter(lines), VOCAB).files()["tokenizer.json"])
    out = args.folder / "out"
    torus = [sys.executable, "-m", "trainer.commands.main", "prepare", "--input", f"{text}/*.jsonl"]
    torus += ["--out", str(out), "--tokenizer", str(tokenizer), "--workers", str(WORKERS)]
    commands = {"torus": [*torus, *args.torus]}
    for name, code in (("datatrove", DATATROVE), ("datasets", DATASETS)):
        if name in args.peers:
            script = args.folder / f"run_{name}.py"
            script.write_text(code)
            given = [str(text), str(tokenizer), str(out), str(WORKERS)]
            commands[name] = [sys.executable, str(script), *given]
    seconds = {name: [] for name in commands}
    for number in range(args.rounds):
        for name in list(commands) if number % 2 == 0 else list(commands)[::-1]:
            shutil.rmtree(out, ignore_errors=True)
            took, peak = run(commands[name], args.folder / f"{name}.log")
            seconds[name].append(took)
            speed = args.megabytes / took
            print(f"{name:10} {took:7.1f} s {speed:6.2f} MB/s {peak:5.2f} GB", flush=True)
    for name in args.peers:
        ratios = [there / here for here, there in zip(seconds["torus"], seconds[name], strict=True)]
        print(f"torus / {name}: {statistics.median(ratios):.2f}×, each {ratios}")


if __name__ == "__main__":
    main()
