"""timm's own modules for the tests, also where torchvision is not installed."""

from tests.torchvision_stand_in import imported

timm = imported("timm")
