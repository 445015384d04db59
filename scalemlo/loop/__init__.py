"""The running program: levels bound to engines, one outer iteration after the other, its gradients and checks."""
