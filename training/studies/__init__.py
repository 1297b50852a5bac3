"""Questions about the method, answered by training: one YAML file in ``questions/`` each, its runs in ``results/``.

    tdm study                                    the questions, and how far each is answered
    tdm study baselines-mixture                  trains what is missing, then writes table and plot

A question's answer is made of its runs' lines alone: one that is there is not made again, and another machine goes on
where the committed lines end. A run that was stopped in between goes on where it was, on the machine that it was on.
"""
