"""What Python reads first in each process that a test starts: garbage is looked for less often.

What TensorFlow brings with it is no garbage, and looking through it is a fifth of its import.
"""

import gc

gc.set_threshold(50_000)
