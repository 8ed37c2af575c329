# Completion of pyrl in bash. Once: pyrl --completion bash > ~/.local/share/bash-completion/completions/pyrl
_pyrl() {
  mapfile -t COMPREPLY < <("$1" --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
# Files where pyrl knows no words.
complete -o default -F _pyrl pyrl
