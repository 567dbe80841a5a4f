"""Libraries that streams run under: PEFT, TRL and vLLM."""
