#compdef pyrl
# Completion of pyrl in zsh. Once: pyrl --completion zsh > DIR/_pyrl, where DIR is in $fpath.
_pyrl() {
  local -a found
  found=(${(f)"$(${words[1]} --complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  # Files where pyrl knows no words.
  if (( $#found )); then compadd -a found; else _files; fi
}
if [[ $funcstack[1] == _pyrl ]]; then _pyrl "$@"; else compdef _pyrl pyrl; fi
