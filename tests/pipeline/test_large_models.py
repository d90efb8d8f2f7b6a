"""Models of hundreds of thousands of tensors: planning them takes little memory for each."""

import json
import tracemalloc

from awq2marlin.checkpoint.opening import open_checkpoint
from awq2marlin.checkpoint.synthetic import Recipe, write_checkpoint
from awq2marlin.pipeline.plan import plan_conversion

EXPERTS = 256


def test_a_plan_takes_less_than_two_kilobytes_for_each_tensor(tmp_path):
    """92 layers of 512 experts have 424,000 tensors: 0.7 GB, as `awq2marlin convert --dry-run` showed in 2026."""
    names = [f"model.layers.0.mlp.experts.{expert}.{each}_proj" for expert in range(EXPERTS) for each in ("up", "down")]
    write_checkpoint(tmp_path / "awq", Recipe(dict.fromkeys(names, (64, 128)), shards=2, group_size=64))
    index = json.loads((tmp_path / "awq" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == 6 * EXPERTS
    tracemalloc.start()
    try:
        plan = plan_conversion(open_checkpoint(tmp_path / "awq"))
        assert len(plan.transfer.digest) == 71
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(plan.converted) == 2 * EXPERTS
    assert peak / len(index) < 2000
