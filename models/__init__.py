"""Pure torch: video VAE, diffusion transformer, flow, text and sampler."""
