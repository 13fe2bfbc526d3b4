"""The serving engine: requests, scheduler, runner, sampler, detokenizer."""
