"""Opens a page in headless Chromium (Qt WebEngine), runs a script there, prints the text that it gives.

``python chromium.py PAGE SCRIPT``: a process of its own, as Chromium does not end tidily inside another one.
"""

# pyright: reportMissingImports=false
# (the dependency group browser)

import os
import sys
from pathlib import Path

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

SETTLED = 200  # ms for the first drawing


def main(page: Path, script: Path) -> None:
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"
    application = QApplication([])
    view = QWebEngineView()

    def finish(result: object) -> None:
        print(result, flush=True)
        os._exit(0)

    def loaded(successful: bool) -> None:
        if not successful:
            print(f"{page} does not load", file=sys.stderr, flush=True)
            os._exit(1)
        text = script.read_text(encoding="utf-8")
        QTimer.singleShot(SETTLED, lambda: view.page().runJavaScript(text, finish))

    view.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(str(page)))
    application.exec()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
