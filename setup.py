"""Packaging: pip install -e . (ColossalAI needs a second command, see README)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Lines of requirements/<name>.txt without comments."""
    lines = (HERE / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


setup(
    name="opensora_like",
    version="0.1.0",
    description="A registry framework for training and fine-tuning video diffusion transformers",
    python_requires=">=3.10",
    packages=find_packages(include=["opensora_like", "opensora_like.*"]),
    install_requires=requirements("base"),
    extras_require={"test": requirements("test"), "wandb": ["wandb"], "ray": requirements("ray")},
)
