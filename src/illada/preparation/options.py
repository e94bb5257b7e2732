"""The settings of a preparation, for Python and the command line. Imports nothing heavy: --help is made from here."""

from dataclasses import dataclass, field
from typing import Literal

from illada.errors import IlladaError

PATTERNS = ("*.txt", "*.text", "*.md", "*.rst", "*.py", "*.txt.gz", "*.jsonl", "*.jsonl.gz", "*.parquet")
"""What is read from a folder unless the user says otherwise; a file named directly is always read. There is no *.json:
one big JSON document per file is rarely text worth learning, and a list of records would be taken for text.
"""

FILTERS = ("gopher", "gopher-repetition", "c4", "fineweb")

_NOT_OFFERED = {
    "language": "it needs a fastText model that would be downloaded",
    "url": "it needs the addresses of the documents and lists that would be downloaded",
    "badwords": "it needs word lists that would be downloaded",
    "unigram": "it needs word frequencies that would be downloaded",
}


@dataclass
class PrepareSettings:
    """What to prepare, how, and where.

    Args:
        sources: text files, .jsonl and .parquet files (also .gz for the first two), and folders of them.
        output: the folder to make.
        tokenizer: folder of the tokenizer; a copy goes with the data.
        kind: "text"; "chat" for records {"messages": [...]} or {"prompt", "response"}; "preference" for pairs of
            answers, {"prompt" or "messages", "chosen", "rejected"} as in TRL; "auto" looks at the first records of
            the files.
        text_field: the field (kind "text") that holds the text of a record.
        documents: whether a plain text file is one document or has one per line.
        patterns: which files of a folder are read.
        exclude: which of those files are not read.
        add_bos: begin each text with the tokenizer's BOS (ours); a conversation begins as its template says.
        add_eos: end each text with EOS (ours); a conversation always ends with one.
        split_turns: one example per assistant turn, not per conversation: the older LLaDA rule (spec §4).
        workers: processes; one process uses all cores for tokenising, several use one each and read in parallel too.
        tokens_per_shard: a shard is closed by the first document that reaches this.
        task_bytes: size of a task, the unit of restarting; 0 for a size that suits the sources.
        dedup: leave out repeated documents: "exact" the equal ones, "minhash" the very similar ones too.
        filters: leave out poor text by known rules, made for English web pages: gopher, gopher-repetition, c4, fineweb.
        executor: "local" for processes of this machine, "ray" for a Ray cluster (RAY_ADDRESS, or started here), "slurm"
            to submit jobs; clusters need sources and output on a disk that all machines share.
        partition: partition of the Slurm cluster.
        time: longest time that a Slurm job may take.
        memory_gb: memory of each worker on Ray and Slurm.
        slurm_options: further options of sbatch, as account=NAME.

    Raises:
        IlladaError: when a value is unknown or out of range, or two settings exclude each other.
    """

    sources: list[str]
    output: str
    tokenizer: str
    kind: Literal["auto", "text", "chat", "preference"] = "auto"
    text_field: str = "text"
    documents: Literal["file", "line"] = "file"
    patterns: list[str] = field(default_factory=lambda: [*PATTERNS])
    exclude: list[str] = field(default_factory=list)
    add_bos: bool = True
    add_eos: bool = True
    split_turns: bool = False
    workers: int = 1
    tokens_per_shard: int = 1 << 27
    task_bytes: int = 0
    dedup: Literal["none", "exact", "minhash"] = "none"
    filters: list[str] = field(default_factory=list)
    executor: Literal["local", "ray", "slurm"] = "local"
    partition: str | None = None
    time: str = "24:00:00"
    memory_gb: int = 2
    slurm_options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check every value, and split lists of filters at commas."""
        self.filters = [name for names in self.filters for name in names.replace(",", " ").split()]
        if self.workers < 1 or self.memory_gb < 1:
            raise IlladaError(f"workers and memory_gb must be at least 1, not {self.workers} and {self.memory_gb}")
        if self.executor not in ("local", "ray", "slurm"):
            raise IlladaError(f"executor is local, ray or slurm, not {self.executor!r}")
        if self.executor == "slurm" and self.partition is None:
            raise IlladaError("executor slurm needs a partition: `sinfo` lists them")
        if self.executor != "slurm" and (self.partition is not None or self.slurm_options):
            raise IlladaError("partition and slurm_options are for executor slurm")
        if self.kind not in ("auto", "text", "chat", "preference") or self.documents not in ("file", "line"):
            raise IlladaError(
                "kind is auto, text, chat or preference and documents is file or line, "
                f"not {self.kind!r} and {self.documents!r}"
            )
        if self.split_turns and self.kind == "text":
            raise IlladaError("split_turns is for conversations: add kind chat")
        if self.split_turns and self.kind == "preference":
            raise IlladaError("split_turns is for kind chat: a preference pair is about its last answers, leave it out")
        if self.dedup not in ("none", "exact", "minhash"):
            raise IlladaError(f"dedup is none, exact or minhash, not {self.dedup!r}")
        for name in self.filters:
            if name in _NOT_OFFERED:
                raise IlladaError(f"no filter {name}: {_NOT_OFFERED[name]}; choose from {', '.join(FILTERS)}")
            if name not in FILTERS:
                raise IlladaError(f"no filter {name!r}: choose from {', '.join(FILTERS)}")
        if self.filters and self.kind in ("chat", "preference"):
            raise IlladaError(f"filters are for texts, not for conversations: leave them out with kind {self.kind}")
        if self.tokens_per_shard < 1 or self.task_bytes < 0:
            raise IlladaError("tokens_per_shard must be at least 1 and task_bytes at least 0")
