"""The demo, in Gradio: one page over one pipeline. `tdm app` and `python app.py` start it (cli/app.py).

`engine.py` holds the one model in memory and draws; `settings.py` checks what visitors ask for; `pictures.py` writes
pictures with their settings and reads them back. Each tab is one file, and `page.py` puts them together.
"""

from pathlib import Path

APP = Path(__file__).parents[1] / "app.py"  # runs any command of this very copy, installed or not
