"""Mixed precision: which linears of a model get more bits than a recipe gives them."""
