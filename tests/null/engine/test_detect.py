"""Which device is at hand, told by the driver where torch need not be imported for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from penstock.engine.device import CPU, H200, Device
from penstock.kernels import device

FACTS = {"COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0, "MULTIPROCESSOR_COUNT": 132}


class FakeDriver(ModuleType):
    """The few calls that are asked, on a machine with one H200. `fails`: the call that returns an error."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("cuda.bindings.driver")
        names = {f"CU_DEVICE_ATTRIBUTE_{name}": name for name in (*FACTS, "L2_CACHE_SIZE")}
        self.CUdevice_attribute = SimpleNamespace(**names)
        self.fails = fails
        for name, answer in {
            "cuInit": lambda _: (),
            "cuDeviceGet": lambda index: (index,),
            "cuDeviceGetAttribute": lambda name, _: ((FACTS | {"L2_CACHE_SIZE": 60 << 20})[name],),
            "cuDeviceGetName": lambda size, _: (b"NVIDIA H200".ljust(size, b"\0"),),
            "cuDeviceTotalMem": lambda _: (141 << 30,),
        }.items():
            setattr(self, name, self._answering(name, answer))

    def _answering(self, name: str, answer: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        return lambda *asked: (100, None) if name == self.fails else (0, *answer(*asked))


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(device, "_torch_is_for_cuda", lambda: True)
    return monkeypatch


def installed(patch: pytest.MonkeyPatch, driver: ModuleType) -> None:
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", bindings), ("cuda.bindings.driver", driver)):
        patch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_the_driver_answers_without_torch(without_torch: pytest.MonkeyPatch, kind: str) -> None:
    installed(without_torch, FakeDriver())
    assert device.detect(kind) == H200
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    "fails", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName", "cuDeviceTotalMem"]
)
def test_what_the_driver_cannot_tell_is_left_to_torch(without_torch: pytest.MonkeyPatch, fails: str) -> None:
    installed(without_torch, FakeDriver(fails))
    assert device._by_driver() is None


def test_a_torch_that_is_not_for_gpus_decides_itself(without_torch: pytest.MonkeyPatch) -> None:
    installed(without_torch, FakeDriver())
    without_torch.setattr(device, "_torch_is_for_cuda", lambda: False)
    assert device._by_driver() is None


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_bindings_without_a_driver_leave_it_to_torch(without_torch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """They find out at the first call that there is none to load, and raise."""

    def missing(_: int) -> None:
        raise error("libcuda.so.1 is not there")

    driver = FakeDriver()
    driver.cuInit = missing  # type: ignore[attr-defined]
    installed(without_torch, driver)
    assert device._by_driver() is None


def test_the_compilers_of_cuda_kernels_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = {"torch": "2.13", "triton": "3.6", "cuda-bindings": "13.5", "nvidia-cuda-nvrtc": "13.0.88"}
    monkeypatch.setattr(device, "_version", lambda name: wheels.get(name, "absent"))
    assert device.software(H200)["nvrtc"] == "13.0.88"
    assert "nvrtc" not in device.software(CPU)
    wheels |= {"cuda-bindings": "12.9", "nvidia-cuda-nvrtc-cu12": "12.8.93"}
    assert device.software(H200)["nvrtc"] == "12.8.93"


@pytest.mark.parametrize(("answer", "expected"), [((0, 13, 1), "13.1"), ((7, 0, 0), "absent"), (None, "absent")])
def test_an_nvrtc_that_is_no_wheel_is_asked(
    answer: tuple[int, ...] | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version() -> tuple[int, ...]:
        if answer is None:
            raise RuntimeError("libnvrtc.so.13 is not there")
        return answer

    bindings = ModuleType("cuda.bindings")
    bindings.nvrtc = SimpleNamespace(nvrtcVersion=version)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(device, "_version", lambda _: "absent")
    assert device.software(H200)["nvrtc"] == expected


def test_without_the_bindings_torch_decides(without_torch: pytest.MonkeyPatch) -> None:
    without_torch.setitem(sys.modules, "cuda.bindings", None)
    assert device._by_driver() is None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("cuda: Optional[str] = '13.0'\n", True), ('cuda = "12.8"\n', True), ("cuda: Optional[str] = None\n", False),
        ("hip = '6.0'\ncuda = None\n", False), ("", False),
    ],
)  # fmt: skip
def test_torchs_own_record_is_read(
    record: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(record)
    monkeypatch.setattr(device, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert device._torch_is_for_cuda() is expected


def test_no_torch_at_all_is_not_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    assert not device._torch_is_for_cuda()
    assert isinstance(device.detect("cpu"), Device)
