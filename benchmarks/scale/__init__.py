"""What many replicas would need: costs that were measured, and a model that rests on them."""
