"""In a clone the folder `kernels` is a part of `lora_fast`, and stands in for no other `kernels`.

Python finds a folder of the current directory, or of a script's, before any installed package.
Imported as ``kernels``, ours gives way to the next on ``sys.path``, and without one to none.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from clones import IMPORT_KERNELS, clone, other_kernels_in, run_python

REFUSED = """
    import sys
    for line in ("import kernels", "from kernels import get_kernel", "import kernels.launch_policy",
                 "import importlib; importlib.import_module('kernels')"):
        try:
            exec(line)
        except ModuleNotFoundError as error:
            assert error.name == "kernels" and str(error) == "No module named 'kernels'", error
        else:
            raise AssertionError(line)
        assert not [name for name in sys.modules if name.partition(".")[0] == "kernels"]
"""
ASK_TRANSFORMERS = """
    import sys
    import transformers.integrations.hub_kernels
    from transformers.utils.import_utils import is_kernels_available
    print(is_kernels_available(), "kernels" in sys.modules)
"""
OTHER_LOADED = """
    import kernels, sys
    assert kernels.OWNER == "another project"
    assert kernels.__spec__.origin == kernels.__file__
    import importlib.util
    assert importlib.util.find_spec("kernels") is kernels.__spec__
    from kernels import OWNER, layer
    import kernels.layer.mode as mode
    assert mode.OWNER == OWNER
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = other_kernels_in(tmp_path_factory.mktemp("kernels_site"))
    layer = folder / "kernels" / "layer"
    layer.mkdir()
    layer.joinpath("__init__.py").write_text("")
    layer.joinpath("mode.py").write_text("from kernels import OWNER\n")
    return folder


def test_without_another_there_is_no_kernels(checkout: Path) -> None:
    places = run_python(REFUSED + IMPORT_KERNELS + REFUSED, checkout).splitlines()
    assert set(places) == {str((checkout / "kernels").resolve())}


def test_another_kernels_is_imported_beside_ours(checkout: Path, other_kernels: Path) -> None:
    """Whichever comes first."""
    for code in (OTHER_LOADED + IMPORT_KERNELS, IMPORT_KERNELS + OTHER_LOADED):
        places = run_python(code, checkout, other_kernels).splitlines()
        assert set(places) == {str((checkout / "kernels").resolve())}


@pytest.mark.parametrize("there", [False, True])
def test_transformers_sees_what_is_installed(
    there: bool, checkout: Path, other_kernels: Path
) -> None:
    """It asks what it finds for a version, and lets the error of a failed import through."""
    code = ASK_TRANSFORMERS + (OTHER_LOADED if there else REFUSED)
    assert run_python(code, checkout, *[other_kernels] * there) == f"{there} {there}"


def test_two_clones_give_way_to_the_package_behind_them(
    checkout: Path, other_kernels: Path, tmp_path: Path
) -> None:
    second = clone(tmp_path)
    path = [checkout, second, checkout, second]
    run_python(REFUSED, checkout, *path)
    run_python(OTHER_LOADED, checkout, *path, other_kernels)
    run_python(OTHER_LOADED, second, *path, other_kernels, *path)


def test_a_folder_that_happens_to_have_the_name_is_no_package(
    checkout: Path, tmp_path: Path
) -> None:
    (tmp_path / "kernels").mkdir()
    run_python(REFUSED, checkout, tmp_path)


def test_an_error_of_the_other_kernels_is_not_hidden(checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise RuntimeError('theirs')")
    code = """
        import sys
        for _ in range(2):
            try:
                import kernels
            except RuntimeError as error:
                print(error, "kernels" in sys.modules)
    """
    assert run_python(code, checkout, tmp_path) == "theirs False\ntheirs False"


def test_modules_and_packages_found_otherwise_than_on_the_path(
    checkout: Path, tmp_path: Path
) -> None:
    """Editable installs put a finder of their own behind that of sys.path."""
    file = tmp_path / "theirs.py"
    file.write_text("OWNER = 'another project'")
    code = f"""
        import importlib.util, sys

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "kernels":
                    return importlib.util.spec_from_file_location(name, {str(file)!r})

        sys.meta_path.append(Finder)
        import kernels
        print(kernels.OWNER)
    """
    assert run_python(code, checkout) == "another project"


@pytest.mark.parametrize("there", [False, True])
def test_python_m_in_the_clone(
    there: bool, checkout: Path, other_kernels: Path, tmp_path: Path
) -> None:
    probe = checkout / "probe.py"
    probe.write_text(
        "try:\n    import kernels\nexcept ModuleNotFoundError:\n    print('none')\n"
        "else:\n    print(kernels.OWNER)\n"
        "import lora_fast.kernels.launch_policy\n"
    )
    code = f"""
        import subprocess, sys
        command = [sys.executable, "-m", "probe"]
        print(subprocess.run(command, cwd={str(checkout)!r}, text=True, capture_output=True,
                             check=True).stdout)
    """
    found = run_python(code, tmp_path, *[other_kernels] * there)
    assert found == ("another project" if there else "none")


def test_our_folder_is_not_run_as_a_program(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernels"], cwd=checkout, text=True, capture_output=True, check=False
    )
    assert done.returncode != 0 and "No module named" in done.stderr


def test_what_is_pickled_names_lora_fast(checkout: Path, tmp_path: Path) -> None:
    """A process that has imported nothing of it finds it again."""
    file = tmp_path / "launch.pickle"
    write = f"""
        import pickle
        from lora_fast.kernels import launch_policy
        config = launch_policy.DecodeConfig(64, num_warps=4)
        with open({str(file)!r}, "wb") as out:
            pickle.dump(config, out)
    """
    read = f"""
        import pickle, sys
        with open({str(file)!r}, "rb") as source:
            print(type(pickle.load(source)).__module__, "kernels" in sys.modules)
    """
    run_python(write, checkout)
    assert run_python(read, checkout) == "lora_fast.kernels.launch_policy False"
