"""Every error code, with what it means and what to do about it: the one place that says which codes there are.

A code is a stable name for scripts, so none is ever removed or given another meaning. docs/json.md shows this table to
users; ``python -m awq2marlin.error_codes`` prints its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from awq2marlin.installing import PLACE, install_command


class Advice(NamedTuple):
    """What a code says to people, in Markdown.

    Attributes:
        meaning: what was found; the exit code too, where it is not 1.
        remedy: what to do about it.
    """

    meaning: str
    remedy: str


#: By code, in the order of the alphabet.
ERROR_CODES: Mapping[str, Advice] = {
    "already-converted": Advice(
        "`convert`: the source is of the format to write. `convert`, `verify`: it holds a "
        "`marlin_manifest.json` that is not a manifest",
        "pass another checkpoint, or choose another format; remove that file",
    ),
    "bad-batch": Advice(
        "the list of a batch, or an option in it, is wrong", "correct the lines that the messages name"
    ),
    "bad-config": Advice(
        "a config holds a value of the wrong kind, or lacks bits or group size",
        "download the file again; correct it if you wrote it",
    ),
    "bad-header": Advice("a safetensors header breaks the format's rules", "download the file again"),
    "bad-index": Advice("the index holds no object `weight_map`", "download the index again"),
    "bad-journal": Advice(
        "the journal of an unfinished output folder is damaged", "remove that output folder and start again"
    ),
    "bad-json": Advice("a file is not UTF-8, not JSON, or nested too deeply", "download the file again"),
    "bad-manifest": Advice(
        "the manifest is malformed, or names files twice or inside each other",
        "download the converted checkpoint again",
    ),
    "bad-name": Advice(
        "the name of a quantized tensor begins with a dot, so its module has no name",
        "rename it, or look for another copy",
    ),
    "bad-offsets": Advice("tensors of a shard overlap or leave a hole", "download the shard again"),
    "bad-record": Advice(
        "a line of the batch record cannot be read", "pass another file with `--record`, or remove this one"
    ),
    "broken-executor": Advice(
        "`--dask`, or Python: a worker of the executor died, or the executor was shut down",
        "run the same command again; it resumes",
    ),
    "changed": Advice(
        "a shard changed between planning and reading",
        "make sure that nothing writes to the source, and run the command again",
    ),
    "config": Advice(
        "the output's config is not the one that the source implies; or two checkpoints have "
        "different bits or groups; exit code 1 or 3",
        "convert again; two checkpoints of different bits or groups hold different numbers",
    ),
    "contradiction": Advice(
        "config, index, tensors or lists say two different things; exit code 1 or 3",
        "see the message; most often the config is of another checkpoint",
    ),
    "different-bytes": Advice(
        "a tensor or file that should be the same differs; exit code 3",
        "of a conversion: convert again; if it comes back, report it. Of two checkpoints: see what differs",
    ),
    "different-value": Advice(
        "a weight, zero point or scale differs; exit code 3",
        "of a conversion: convert again; if it comes back, report it. Of two checkpoints: see what differs",
    ),
    "disk-full": Advice(
        "the disk or the quota is full, or will be", "free some space and run the same command again; it resumes"
    ),
    "duplicate-key": Advice("a JSON object names a key twice", "download the file again"),
    "duplicate-tensor": Advice(
        "two shards hold a tensor of the same name, and no index says which counts", "download the checkpoint again"
    ),
    "error-page": Advice(
        "an HTML page, JSON or text is in place of a file: a server's answer to a download",
        "download the file again",
    ),
    "extra-tensor": Advice(
        "`verify`, `revert`, `inspect`: the converted checkpoint has a tensor that the source does not; exit code 1 "
        "or 3",
        "convert again",
    ),
    "file-too-large": Advice(
        "the file system or a limit does not allow a file of this size",
        "raise the limit (`ulimit -f`) or write elsewhere",
    ),
    "foreign-format": Advice(
        "the checkpoint is quantized in a format that awq2marlin does not read",
        "see the message; look for another version of this model",
    ),
    "gemm-difference": Advice(
        "`--device`: with identity activations the GEMM does not reproduce the source's weight; exit code 3",
        "report it; the message names the place",
    ),
    "gemm-error": Advice(
        "`--device`: the GEMM's error is above the bound that K and the type imply; exit code 3",
        "report it, with what `awq2marlin doctor` prints",
    ),
    "header": Advice(
        "a shard's header differs from the source's in metadata or the order of names; exit code 3", "convert again"
    ),
    "header-too-long": Advice(
        "a shard claims a header above 100 MB", "it is damaged, or not a safetensors file; download it again"
    ),
    "hub-bad-answer": Advice(
        "the Hub sent an invalid answer: an impossible commit, name, size or digest",
        "run the command again; report it if it happens again",
    ),
    "hub-bad-card": Advice("the Hub refused the front matter of `README.md`", "correct it there, as the message says"),
    "hub-bad-name": Advice("not a valid repository name", "it must be like `org/name`"),
    "hub-conflict": Advice("somebody else is changing the repository", "run the command again"),
    "hub-disabled": Advice("the Hub has disabled the repository", "choose another"),
    "hub-failed": Advice(
        "the Hub client failed in a way that this table does not list", "see the message; run the command again"
    ),
    "hub-forbidden": Advice("the token may not do this", "create one that may, in your account settings"),
    "hub-gated": Advice("the repository is gated", "ask for access on its page, then log in with `hf auth login`"),
    "hub-incomplete": Advice(
        "`push`: after the commit the repository does not hold what was sent",
        "check its `.gitignore`, and whether somebody else writes to it",
    ),
    "hub-no-file": Advice("a file is not in the repository", "run the command again"),
    "hub-no-revision": Advice("the repository has no such branch, tag or commit", "check the revision"),
    "hub-not-found": Advice(
        "there is no such repository, or the token may not see it", "check the name; log in with `hf auth login`"
    ),
    "hub-offline": Advice("`HF_HUB_OFFLINE` is set, and what is needed is not in the cache", "unset it"),
    "hub-quota": Advice(
        "payment required: the storage quota or plan of the account is exceeded",
        "free storage, or ask the owner of the account",
    ),
    "hub-rate-limit": Advice("too many requests", "wait, then run the same command again"),
    "hub-refused": Advice("the Hub refused a request", "see the message"),
    "hub-short-answer": Advice("the Hub sent fewer bytes than were asked for", "run the command again"),
    "hub-unauthorized": Advice(
        "the Hub rejected the token, or there is none", "log in with `hf auth login`, or set `HF_TOKEN`"
    ),
    "hub-unavailable": Advice("the Hub failed", "wait, then run the same command again"),
    "hub-unreachable": Advice("no connection to the Hub", "check network and proxy, then run the same command again"),
    "in-use": Advice("another process is writing to this output folder", "wait for it, or choose another folder"),
    "internal-error": Advice(
        "a bug in awq2marlin; a command shows the traceback on standard error", "report it, with the traceback"
    ),
    "interrupted": Advice(
        "you interrupted the command; exit code 130",
        "run the same command again; `convert`, `batch`, `revert` and `push` resume",
    ),
    "io-error": Advice("the device or the network file system failed", "check the disk, then run the command again"),
    "killed-workers": Advice(
        "`--dask`: several workers died one after another on the same shard",
        "give the workers more memory; run the command again; it resumes",
    ),
    "lfs-pointer": Advice(
        "a Git LFS pointer is in place of a file, as after a clone without Git LFS",
        "run `git lfs install` and `git lfs pull` in its folder, or download the file",
    ),
    "manifest": Advice(
        "the manifest does not record the source or the output as they are, so `revert` would fail; exit code 3",
        "convert again",
    ),
    "missing-file": Advice("one of the two checkpoints lacks a file; exit code 1 or 3", "download or convert it again"),
    "missing-tensor": Advice("a tensor is missing; exit code 1 or 3", "download the shard again"),
    "moved-tensor": Advice(
        "a tensor is in another shard, or in another order, than in the source; exit code 1 or 3", "convert again"
    ),
    "name-too-long": Advice("the file system does not allow a name of this length", "write to a shorter path"),
    "no-cluster": Advice(
        "`--dask`: no scheduler answers at this address", "check the address, and that the scheduler runs"
    ),
    "no-config": Advice("the folder or repository has no `config.json`", "pass a complete checkpoint folder"),
    "no-dask": Advice("`--dask` without Dask", f"`{install_command('dask')}` {PLACE}"),
    "no-gpu": Advice("`--device cuda`, but PyTorch has no GPU", "see `awq2marlin doctor`, or use `--device cpu`"),
    "no-index": Advice(
        "several shards, but no `model.safetensors.index.json`, and two hold a tensor of the same name, or one cannot "
        "be read",
        "download the index, or leave out what does not belong to the checkpoint with `--leave`",
    ),
    "no-kernel": Advice(
        "`--device`: the kernel cannot be compiled or run here",
        "the message says what is missing; see `awq2marlin doctor`",
    ),
    "no-manifest": Advice("a converted checkpoint lacks `marlin_manifest.json`", "download the manifest"),
    "no-matplotlib": Advice(
        "`--plot`, or `--report` with `--device`, without Matplotlib", f"`{install_command('plot')}` {PLACE}"
    ),
    "no-permission": Advice("the system denies access", "check owner and mode of the file or folder"),
    "no-quantized-modules": Advice(
        "the config says AWQ, but no tensor is a `qweight`",
        "the config does not belong to these shards; download both again",
    ),
    "no-torch": Advice("`doctor`: PyTorch cannot be imported", "install PyTorch, or repair the installation"),
    "no-weights": Advice("the folder holds no safetensors file", "download the complete checkpoint"),
    "no-workers": Advice("`--dask`: the cluster has no workers", "start some"),
    "not-a-file": Advice("something that must be a file is a folder, a pipe or a device", "put the file there"),
    "not-a-folder": Advice("something that must be a folder is a file", "pass a folder"),
    "not-converted": Advice(
        "`revert`, `push`: awq2marlin did not convert this checkpoint", "pass the converted checkpoint"
    ),
    "not-empty": Advice(
        "the output folder holds foreign files or a finished conversion",
        "choose another folder, or use `--overwrite` for an earlier conversion",
    ),
    "not-found": Advice(
        "no such file or folder, or a link to one that does not exist", "check the name; fetch the file again"
    ),
    "not-quantized": Advice("the checkpoint has no quantization config", "pass one that is quantized"),
    "not-shared": Advice(
        "`--dask`, or Python: a worker of the executor wrote its shard where this process does not see it",
        "put the output on storage that all workers share",
    ),
    "os-error": Advice("another error of the operating system", "see the message"),
    "other-plan": Advice(
        "the output folder holds an unfinished run of another source, with other options, or of another version",
        "finish that one, or start again in another folder; for `convert`, `--overwrite` starts again in this one",
    ),
    "other-version": Advice(
        "`--dask`, or Python: a worker of the executor has another version of this package",
        "install the same version everywhere",
    ),
    "out-of-memory": Advice(
        "there is not enough memory; with `--device`, on the GPU",
        "use fewer `--workers`; free the GPU, or use `--device cpu`",
    ),
    "overlap": Advice(
        "source and output are the same folder, or one is inside the other", "choose another output folder"
    ),
    "pickled-weights": Advice("the weights are pickled", "look for a safetensors version of the model"),
    "read-only": Advice("the file system is mounted read-only", "write elsewhere"),
    "shape-overflow": Advice("a header states a shape that no file can hold", "download the shard again"),
    "size-mismatch": Advice(
        "a tensor's shape and type need another number of bytes than it has", "download the shard again"
    ),
    "target-finished": Advice(
        "`convert --push-to`: the repository already holds this conversion", "nothing, or use `--overwrite`"
    ),
    "target-public": Advice(
        "`push --private`: the repository exists and is public", "make it private in its settings, or choose another"
    ),
    "target-taken": Advice(
        "`push`: the repository holds a checkpoint of another model or run",
        "use `--overwrite` or `--create-pr`, or choose another",
    ),
    "too-large": Advice(
        "a JSON file is above 256 MB or holds more than 8 million values, a model card is above 8 MB; or the output "
        "would have such a file, a header above 100 MB, or headers above 256 MB together",
        "it is damaged, download it again; shorten the card, or the metadata of the shards",
    ),
    "too-many-files": Advice(
        "the process has too many open files", "raise the limit (`ulimit -n`) or use fewer `--workers`"
    ),
    "trailing-data": Advice("a shard holds bytes that no tensor owns", "download the shard again"),
    "truncated": Advice(
        "a file ends too early, or became shorter while it was read",
        "download it again, and make sure that nothing writes to the source",
    ),
    "unaligned": Advice(
        "`convert --unaligned error`: a module is unaligned. Otherwise: a module that counts as converted has a shape"
        " that Marlin cannot have; exit code 1 or 3",
        "use `--unaligned keep` or `--unaligned pad`; otherwise convert again",
    ),
    "unexpected-error": Advice(
        "`batch`: a bug in awq2marlin, in one item", "report it, with what `awq2marlin convert` prints for its source"
    ),
    "unfinished": Advice(
        "the conversion or the revert into this folder is not finished", "run the same command again first"
    ),
    "unfinished-download": Advice(
        "a download manager's file (`.aria2`, `.part`, `.incomplete`) beside a shard says that it is not whole",
        "finish the download, or remove that file",
    ),
    "unknown-dtype": Advice("a header names a data type that the format does not have", "download the shard again"),
    "unknown-module": Advice(
        "the config of a converted checkpoint lists a module that the source does not have quantized; exit code 1 or 3",
        "convert again",
    ),
    "unknown-picture": Advice(
        "`--plot`: the file name does not end like a picture's", "use a name that ends in `.png`"
    ),
    "unknown-report": Advice(
        "`verify --report`: the file is not `.html`, or would be inside a checkpoint; `push "
        "--report`: it is not a report",
        "see the message",
    ),
    "unsafe-link": Advice(
        "a link leads out of the folder, or in circles",
        "copy the file there if it belongs to the checkpoint, or use `--follow-links`",
    ),
    "unsafe-name": Advice(
        "a file name is absolute, has `..`, control or bidirectional characters; or differs from one of the files that "
        "awq2marlin writes only in upper and lower case",
        "rename the file; do not trust a checkpoint that names such files",
    ),
    "unsupported-bits": Advice("bits are neither 4 nor 8", "look for a 4-bit or 8-bit checkpoint"),
    "unsupported-device": Advice(
        "a loader: the model is to go to a device for which there are no kernels", "use a CUDA GPU, or the CPU"
    ),
    "unsupported-dtype": Advice("a loader: the model would be neither fp16 nor bf16", "pass `dtype`"),
    "unsupported-engine": Advice(
        "in vLLM or SGLang: this version, or these settings of it, cannot serve the checkpoint",
        "see the message, and [vllm.md](vllm.md) or [sglang.md](sglang.md)",
    ),
    "unsupported-format": Advice("`format_version` is not 1", "install a newer awq2marlin"),
    "unsupported-group-size": Advice(
        "the group size is not -1, 32, 64 or 128", "look for a checkpoint of another group size"
    ),
    "unsupported-model": Advice(
        "a loader: the model's code joins or splits a quantized module", "revert the checkpoint"
    ),
    "unsupported-parallelism": Advice("a loader: tensor parallelism in Transformers", "use `device_map`"),
    "usage": Advice(
        "the command line is wrong; exit code 2. `batch`: an option does not fit the source of one item",
        "see `awq2marlin COMMAND --help`",
    ),
    "wrong-digest": Advice(
        "`revert`, `push`: a file is not the one that the manifest recorded; exit code 3. Elsewhere: "
        "it differs from what the Hub, or its name in the Hub's cache, says",
        "download the checkpoint again, or convert again",
    ),
    "wrong-dtype": Advice(
        "a tensor of a quantized module has an unsupported type, such as fp32 scales; exit code 1 or 3",
        "look for a checkpoint with fp16 or bf16 scales",
    ),
    "wrong-shape": Advice("a tensor has the wrong shape; exit code 1 or 3", "download or convert again"),
}


def table_rows() -> list[str]:
    """Returns the rows of the table in docs/json.md."""
    return [f"| `{code}` | {advice.meaning} | {advice.remedy} |" for code, advice in ERROR_CODES.items()]


if __name__ == "__main__":
    print("\n".join(table_rows()))
