"""The error classes: one message in, the same message out, also through pickle; an exit code for each."""

import inspect
import pickle
import re

import pytest

from megatrain_io import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]
MESSAGE = "store.mtio needs 24 GiB and 3 GiB are free: free space (nothing was left behind)"


@pytest.mark.parametrize("cls", CLASSES)
def test_message_survives_str_and_pickle(cls: type[errors.MegatrainIoError]) -> None:
    error = cls(MESSAGE)
    assert str(error) == MESSAGE
    assert error.args == (MESSAGE,)

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes, a line above
    assert type(copy) is cls
    assert str(copy) == MESSAGE


@pytest.mark.parametrize("cls", CLASSES)
def test_class_is_one_of_ours_and_documented(cls: type[errors.MegatrainIoError]) -> None:
    assert issubclass(cls, errors.MegatrainIoError)
    assert cls.__module__ == "megatrain_io.errors"
    assert cls.__doc__ is not None
    assert len(cls.__doc__.strip().split("\n\n")) >= 2, "when it is raised; what is safe and what to do"


def test_exit_codes_are_those_of_the_table() -> None:
    documented = {
        int(code) for code in re.findall(r"^ *(\d+)  \S", inspect.getdoc(errors) or "", re.MULTILINE)
    }
    assert {cls.exit_code for cls in CLASSES} | {0} == documented


def test_all_lists_every_class() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert set(errors.__all__) == defined


def test_users_catch_them_as_builtins() -> None:
    for builtin, ours in [
        (ValueError, errors.ConfigError),
        (OSError, errors.CorruptionError),
        (TimeoutError, errors.PoolExhaustedError),
        (BufferError, errors.BufferInUseError),
        (RuntimeError, errors.UsedAfterForkError),
    ]:
        with pytest.raises(builtin, match="nothing was left behind"):
            raise ours(MESSAGE)
