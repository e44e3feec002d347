"""The loss of each objective before the first update. No torch here: the report reads it too."""

import math

# At step 0 every reward and the shift are 0. (value, as a formula); None: the value depends on the model.
# Label smoothing does not change them: log s(0) is log s(-0).
VALUE_AT_REFERENCE: dict[str, tuple[float, str] | None] = {
    "spot_bce": (2 * math.log(2), "2 ln 2"),
    "spot_bco": (2 * math.log(2), "2 ln 2"),
    "dpo": (math.log(2), "ln 2"),
    "reward_sft": (math.log(2), "ln 2"),
    "sft": None,
    "dft": None,
}
