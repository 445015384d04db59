"""``python -m scalemlo``, for launchers that take a module."""

from .cli.main import run

if __name__ == "__main__":
    run()
