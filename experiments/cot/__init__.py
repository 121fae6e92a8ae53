"""`codi cot`: a latent chain-of-thought vector, derived, placed, tried and looked at (Zhang, Viteri, arXiv 2409.14026).

derive   the vector: step-by-step minus immediate answers of the model itself
grid     layer × coefficient, continuous and single steering, on validation questions; what is chosen
eval     the chosen steering on test questions, beside prompts and controls; claims
show     norms, cosines, readings of the vector, texts side by side
run      derive, grid and eval in one go
"""
