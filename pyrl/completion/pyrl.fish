# Completion of pyrl in fish. Once: pyrl --completion fish > ~/.config/fish/completions/pyrl.fish
function __pyrl_words
    set -l before (commandline -opc)
    set -l typed (commandline -ct)
    set -l program $before[1]
    set -e before[1]
    set -l found ($program --complete $before "$typed" 2>/dev/null)
    # Files where pyrl knows no words.
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$typed"
    end
end
complete -c pyrl -f -a '(__pyrl_words)'
