"""The reader of README blocks sees every block and every mark: a block it missed would be a command nobody runs."""

from __future__ import annotations

from pathlib import Path

from support.markdown import shell_blocks

TEXT = """# T
```bash
one
```
text
<!-- no-run: needs a Jetson -->
```bash
two
```
<!-- run-as: fmdeploy demo --fast --out out/demo -->

```bash
make demo
```
- list
  ```sh
  three
  ```
```python
four
```
"""


def test_blocks_and_marks(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(TEXT)
    found = [(b.language, b.mark, b.script.strip()) for b in shell_blocks(file)]
    assert found == [
        ("bash", "", "one"),
        ("bash", "no-run", "two"),
        ("bash", "run-as", "fmdeploy demo --fast --out out/demo"),
        ("sh", "", "three"),
    ]
    assert shell_blocks(file)[0].name == "README.md:2"
