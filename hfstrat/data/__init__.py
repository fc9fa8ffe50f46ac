"""From files to tensors, in three steps.

Read: `sources` finds the files or Hub data set, `readers` reads rows, `formats` turns a row into an example, `messages` reads
its messages. Render: `render` turns an example into token ids and labels (`chat_template`: what the template supports;
`answers`: where answers are; `coverage`: what is left out; `segments`: ids of consecutive texts). Prepare: `prepare.prepare`
does both for a recipe, through the `cache`, and chooses the evaluation rows (`tokenize`, `splits`, `stats`). `collate` and
`packing` make batches of the result. `labeled` reads and tokenizes rows with labels, `classes` prepares those of a
classification.
"""
