"""hybridize env."""

from __future__ import annotations

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make


@make(name="env", examples=("hybridize env", "hybridize env --json"))
def command(settings: Settings) -> None:
    """Show versions, processor, memory and GPUs; for problem reports."""
    from hybridize.cli.environment import environment
    from hybridize.cli.format import bytes_text

    found = environment()
    human = [f"{name:<14} {version}" for name, version in found["versions"].items()]
    human.append(f"{'platform':<14} {found['platform']}")
    memory = bytes_text(found["memory_bytes"]) if found["memory_bytes"] else "unknown memory"
    human.append(f"{'processor':<14} {found['cpu_count']} cores, {found['torch_threads']} threads, {memory}")
    human.append(f"{'cuda':<14} {found['cuda'] or 'none'}")
    for gpu in found["gpus"]:
        human.append(f"{'gpu':<14} {gpu['name']}, {bytes_text(gpu['memory_bytes'])}, {gpu['capability']}")
    settings.output.result("env", found, human)
