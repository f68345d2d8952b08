"""One model, one image -> a map. Tensors only; works on foreign models, since it knows no model at all."""
