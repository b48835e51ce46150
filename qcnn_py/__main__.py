"""What ``qcnn`` and ``python -m qcnn_py`` start."""

import sys

# Which extra brings a package, by the name it is imported under; "pipeline" brings
# the others.
_EXTRAS = {
    "PIL": "cli",
    "onnx": "onnx",
    "onnxruntime": "bench",
    "openvino": "bench",
    "rich": "cli",
    "rich_click": "cli",
}


def main() -> None:
    """Run the command line; a missing package ends it with one line."""
    try:
        from qcnn_py.cli import cli

        cli(prog_name="qcnn")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == __package__:
            raise
        extra = _EXTRAS.get(package, "pipeline")
        sys.exit(
            f"qcnn: this needs the package {package}: pip install 'qcnn-py[{extra}]'"
        )
    except ImportError as error:
        sys.exit(f"qcnn: {error}")


if __name__ == "__main__":
    main()
