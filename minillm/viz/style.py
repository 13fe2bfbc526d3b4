"""Colours of every figure: Okabe and Ito's palette, told apart by colour-blind readers, on light and dark pages."""

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
GREY = "#7f7f7f"
