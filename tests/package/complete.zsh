# Types the start of an option and a tab into a zsh on a terminal, and prints
# what it makes of it.
zmodload zsh/zpty
zpty -b shell zsh -f -i
zpty -w shell 'PS1=; autoload -Uz compinit; compinit -u -D; print READY'
# Echoed as it is typed, and then printed.
zpty -r shell screen '*READY*READY*'
zpty -w -n shell $'vmafx-bypass warm --ch\t'
zpty -r shell screen '*--check*'
print -r -- $screen
