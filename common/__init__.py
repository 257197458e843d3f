"""The machinery that every stage shares, in small rooms.

`import common` loads this index alone; the room of common.load_npy is opened when that is first
used. So a formula can be imported from a stage without locks, progress bars or pictures.
"""
import functools
import importlib

ROOMS = {
    "errors": "UserError need reading user_errors", "stage": "Stage claim provenance",
    "processes": "world rank get_device single_process barrier all_reduce shard from_rank0 gather "
                 "log progress",
    "cli": "Parser number count batch_type add_run_flags add_list_flag",
    "files": "atomic sweep need_disk free_for_output allocate save_npy save_pt save_text "
             "save_json load_npy load_npz load_pt load_json load_record load_lines fields "
             "check_finite sound_rows named_twice sha256",
    "workers": "open_pool work_ahead", "rowfill": "fill fill_features fill_tokens",
    "origins": "upstream record_of sample_names samples_of device_seconds",
    "inputs": "open_data check_classes rows_by_class load_features load_scores check_origin "
              "load_indices open_kept_images text_tokens load_checkpoint open_checkpoint "
              "open_scorer open_encoder open_judges networks_in",
    "pixels": "adm_crop read_image", "listing": "", "containers": "", "labels": "",
    "sources": "kind_of read_source", "signals": "", "precision": "AMP_CHOICES settle_amp",
    "loop": "AMP autocast generator random_scores fast_float32 share_out Draws step_draws lr_at "
            "optimizer_of backward optimizer_step",
    "training": "training_source need_even_batch load_kept load_class_weights load_text "
                "load_visual need_same need_trained_on inherit_flags",
    "run": "Run divergence is_due Stop", "rows": "DeviceRows StepRecord device_budget as_input",
    "pictures": "no_bombs save_grid rank_montage cut_montage figure plain save_figure "
                "save_weights class_histograms", "answers": "", "comparison": "",
}
_room_of = {name: room for room, names in ROOMS.items() for name in names.split()}


def __getattr__(name):
    """The function, class or room `name`; its file is read now if it has not been before."""
    if name in ROOMS:
        return importlib.import_module(f"common.{name}")
    if name in _room_of:
        return getattr(importlib.import_module(f"common.{_room_of[name]}"), name)
    raise AttributeError(f"module 'common' has no attribute {name!r}")


def command(main):
    """Decorator of a script's main(argv): errors and signals end in one line and an exit code."""
    @functools.wraps(main)
    def run(argv=None):
        return importlib.import_module("common.cli").run_command(main, argv)
    return run
