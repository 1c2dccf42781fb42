"""What can be wrong with a YAML text, in words. No torch."""

import yaml

__all__ = ["NOT_YAML", "yaml_problem"]

NOT_YAML = (yaml.YAMLError, ValueError, AttributeError, RecursionError)
"""What PyYAML raises: the others for dates and numbers that are none, wrong tags, and what is nested too deeply."""


def yaml_problem(error: Exception) -> str:
    """What one of ``NOT_YAML`` says, on one line, with its place where it has one."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "integer string conversion" in str(error):
        return "a number has more digits than are read"
    if isinstance(error, AttributeError):
        return "it is not what its tag says"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())
