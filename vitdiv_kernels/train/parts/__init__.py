"""What goes along with a run: loggers, monitor, moving average, progress bar, each a file.

A part is a dataclass. Its fields are options of the command line, and `takes_part` says whether it is wanted.
To add one, write its file and put its class into PARTS.
"""

from .bar import ProgressBar
from .base import Part
from .collapse import Collapse
from .csv_log import CsvLog
from .ema import Ema
from .pictures import Pictures
from .speed import Speed
from .tensorboard import TensorBoard

# they are told in this order: those that measure before those that log
PARTS: tuple[type[Part], ...] = (
    *(Ema, Speed, CsvLog, TensorBoard, Collapse),
    *(Pictures, ProgressBar),
)

__all__ = ["PARTS", "Collapse", "CsvLog", "Ema", "Part", "Pictures", "ProgressBar", "Speed", "TensorBoard"]
