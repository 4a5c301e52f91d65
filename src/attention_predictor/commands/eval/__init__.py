"""Run a benchmark on a model under several selection policies. Each benchmark is a subcommand.

examples:
  attnpred eval needle --data texts/ --no-chat --out runs/needle
  attnpred eval longbench --data longbench/ --no-chat --out runs/longbench \\
      --policies full,predictor,snapkv --budgets 512,1024
  attnpred eval recovery --data texts/ --recovery 4 --rule predictor
"""
