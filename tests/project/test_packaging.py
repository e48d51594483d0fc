"""What is installed is `lora_fast` and nothing else, and it lives beside Hugging Face's `kernels`.

Our Triton sources lie in a folder called `kernels`, as does a package on PyPI that transformers
imports. Each test runs in a process of its own, away from this checkout; those of a clone, in which
nothing is installed, are in kernels/test_import.py.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from clones import IMPORT_KERNELS, KERNELS, ROOT, clone, other_kernels_in, run_python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("checkout"))


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
    return other_kernels_in(tmp_path_factory.mktemp("kernels_site"))


IMPORT_EVERYTHING = (
    """
    import lora_fast, transformers, peft
    import transformers.integrations.hub_kernels
"""
    + IMPORT_KERNELS
)


def test_there_are_kernels_to_install() -> None:
    assert KERNELS


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
    assert packed == sources | {
        f"lora_fast/kernels/{name}.py" for name in ("__init__", *KERNELS)
    } | {"lora_fast/py.typed"}


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
    assert run_python(code, checkout) == "['lora_fast', 'lora_fast.version'] []"


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
