"""What is installed is `lora_fast` and nothing else, and it lives beside Hugging Face's `kernels`.

Our Triton sources lie in a folder called `kernels`, as does a package on PyPI that transformers
imports. Each test runs in a process of its own, away from this checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Run ``code`` in a new process in ``cwd`` with ``path`` as PYTHONPATH; return its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds of the package, so that builds leave this tree alone."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("lora_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", out, checkout], check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it."""
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--quiet", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return target


@pytest.fixture(scope="module")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed distribution `kernels` of a version that transformers accepts.

    Whatever name transformers takes from it is a class that accepts every call.
    """
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    target = tmp_path_factory.mktemp("kernels_site")
    package = target / "kernels"
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        textwrap.dedent(
            """
            OWNER = "another project"

            class _AnyClass(type):
                def __getattr__(cls, name):
                    if name.startswith("__"):
                        raise AttributeError(name)
                    return cls()

            class Anything(metaclass=_AnyClass):
                def __init__(self, *args, **kwargs):
                    pass

                def __call__(self, *args, **kwargs):
                    return args[0] if args else self

                def __or__(self, other):
                    return self

            def __getattr__(name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return Anything
            """
        )
    )
    info = target / f"kernels-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    info.joinpath("METADATA").write_text(metadata)
    return target


IMPORT_KERNELS = f"""
    import importlib, pathlib
    for name in {KERNELS}:
        module = importlib.import_module("lora_fast.kernels." + name)
        print(pathlib.Path(module.__file__).resolve().parent)
"""
IMPORT_EVERYTHING = (
    """
    import lora_fast, transformers, peft
    import transformers.integrations.hub_kernels
"""
    + IMPORT_KERNELS
)


def test_there_are_kernels_to_install() -> None:
    assert KERNELS
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_only_top_level_name_of_the_wheel_is_lora_fast(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"lora_fast"}


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lora_fast/")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lora_fast").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert packed == sources | {f"lora_fast/kernels/{name}.py" for name in KERNELS} | {
        "lora_fast/py.typed"
    }


def test_installed_package_works_without_the_other_kernels(installed: Path, tmp_path: Path) -> None:
    places = set(run_python(IMPORT_EVERYTHING, tmp_path, installed).splitlines())
    assert places == {str((installed / "lora_fast" / "kernels").resolve())}
    # Nothing of ours may answer to the bare name.
    code = """
        import importlib.util, lora_fast
        spec = importlib.util.find_spec("kernels")
        print(spec.origin if spec else None)
    """
    found = run_python(code, tmp_path, installed)
    assert not found.startswith((str(installed), str(ROOT)))


def test_installed_package_works_beside_the_other_kernels(
    installed: Path, other_kernels: Path, tmp_path: Path
) -> None:
    code = IMPORT_EVERYTHING + "\n    import kernels\n    print(kernels.OWNER)"
    *places, owner = run_python(code, tmp_path, installed, other_kernels).splitlines()
    assert set(places) == {str((installed / "lora_fast" / "kernels").resolve())}
    assert owner == "another project"


def test_uninstalled_checkout_finds_its_kernels(checkout: Path, other_kernels: Path) -> None:
    """Its root comes first on sys.path, and still ``kernels`` is the installed package."""
    code = IMPORT_KERNELS + "\n    import kernels\n    print(kernels.OWNER)"
    *places, owner = run_python(code, checkout, other_kernels).splitlines()
    assert set(places) == {str((checkout / "kernels").resolve())}
    assert owner == "another project"


def test_editable_install_maps_the_kernels_folder(
    checkout: Path, other_kernels: Path, tmp_path: Path
) -> None:
    build = "import sys; from setuptools.build_meta import build_editable as b; b(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=checkout, check=True)
    (path,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(path).extractall(site)
    # First forget the editable install that this very environment may have.
    code = f"""
        import site, sys
        sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(f)]
        for name in [name for name in sys.modules if name.startswith("__editable__")]:
            del sys.modules[name]
        site.addsitedir({str(site)!r})
        import importlib, lora_fast
        print(lora_fast.__file__)
        for name in {KERNELS}:
            print(importlib.import_module("lora_fast.kernels." + name).__file__)
        import kernels
        print(kernels.OWNER)
    """
    first, *places, owner = run_python(code, tmp_path, site, other_kernels).splitlines()
    assert Path(first).parent == checkout / "lora_fast"
    assert {Path(place).parent for place in places} == {checkout / "kernels"}
    assert owner == "another project"


def test_import_is_light_and_asks_nothing_of_a_gpu(checkout: Path) -> None:
    code = """
        import sys, torch
        asked = []
        def spy(name):
            def ask(*args, **kwargs):
                asked.append(name)
                return 0
            return ask
        for name in ("is_available", "device_count", "get_device_capability", "_lazy_init",
                     "get_device_properties", "current_device"):
            setattr(torch.cuda, name, spy(name))
        before = set(sys.modules)
        import lora_fast
        dir(lora_fast)
        print(sorted(set(sys.modules) - before), asked)
    """
    assert run_python(code, checkout) == "['lora_fast'] []"


def test_dense_layers_load_nothing_but_lora_fast(checkout: Path) -> None:
    """bitsandbytes, which takes longer to import than torch, comes with the first NF4 weight."""
    code = """
        import sys, torch
        x, W, A, B = (torch.randn(4, 4, requires_grad=i != 1) for i in range(4))
        (x @ W).sum().backward()
        before = set(sys.modules)
        import lora_fast
        y = lora_fast.functional.adapted_linear(x, W, A=A, B=B)
        y.sum().backward()
        assert B.grad is not None
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    assert run_python(code, checkout) == "['lora_fast']"


def test_every_public_name_resolves() -> None:
    import lora_fast

    assert set(lora_fast.__all__) <= set(dir(lora_fast))
    for name in lora_fast.__all__:
        assert getattr(lora_fast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = lora_fast.nonsense
