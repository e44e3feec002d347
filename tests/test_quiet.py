"""Known warnings are hidden, all others are shown."""

from __future__ import annotations

import warnings

from spot_megatron.quiet import hide_known_warnings


def test_only_known_warnings_are_hidden():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_known_warnings()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("the loss is not finite", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["the loss is not finite"]
