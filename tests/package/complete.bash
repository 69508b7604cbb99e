# Prints what bash offers after `vmafx-bypass read --engine `, as sorted words.
source /usr/share/bash-completion/completions/vmafx-bypass
completer=$(complete -p vmafx-bypass | sed 's/.*-F \([^ ]*\).*/\1/')
COMP_WORDS=(vmafx-bypass read --engine "")
COMP_CWORD=3
"$completer" vmafx-bypass "" --engine
printf '%s\n' "${COMPREPLY[@]}" | sort | xargs
