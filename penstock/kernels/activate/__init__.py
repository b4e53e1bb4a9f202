"""An activation without a gate."""
