"""The configs of Accelerate beside the examples: each is read, and with one the loop without a Trainer runs on two processes."""

import json
import subprocess
import sys

import pytest

from launch import LIMIT, PLAIN, ROOT


def test_the_loop_without_a_trainer_runs_on_two_processes(tmp_path):
    """`accelerate launch --config_file`, the bundled model and data, few steps."""
    pytest.importorskip("datasets")
    from accelerate.commands import accelerate_cli

    options = {"max_train_samples": 64, "max_eval_samples": 32, "max_train_steps": 6, "per_device_train_batch_size": 4}
    options |= {"gradient_accumulation_steps": 2, "switch_step": 3, "max_length": 16, "output_dir": tmp_path / "model"}
    command = [sys.executable, accelerate_cli.__file__, "launch", "--config_file"]
    command += [str(ROOT / "examples" / "accelerate_configs" / "cpu_2_processes.yaml"), "--main_process_port", "0"]
    command += [str(ROOT / "examples" / "text_classification_no_trainer.py")]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, env=PLAIN, capture_output=True, text=True, timeout=LIMIT)
    if "is not installed" in done.stderr:
        pytest.skip("the packages with the bundled model and data are not installed (examples/requirements-data.txt)")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 process(es), MULTI_CPU: switched at step 3" in done.stdout and "step 6 of 6: test accuracy" in done.stdout
    assert "learning rate times" in done.stdout + done.stderr  # the schedule was not handed over, and the rate stayed
    ranks = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["ranks"]
    assert len(ranks) > 20 and (tmp_path / "model" / "model.safetensors").stat().st_size < 70e6 < 22.7e6 * 4


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_the_configs(path):
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "fp16", "bf16")
